"""Requests that cannot be met: plans, statistics, counts, recipes, text, the machine and its folders."""

import shutil

from bad_input import Given, case
from moeslim.artifacts.commit import read_json, write_json
from tiny import write_tiny

# Plans and statistics


@case("made for a model with layers 4", "this one has 2", "make a new plan")
def plan_for_another_model(given: Given) -> list[object]:
    return given.cut(write_tiny(given.home / "other", vocab_size=2048, num_hidden_layers=2))


@case("step 1 (cut_experts)", "layer 1", "keeps 3 experts", "the same number everywhere")
def plan_with_unequal_layers(given: Given) -> list[object]:
    plan = read_json(given.plan)
    plan["steps"][0]["kept"]["1"].pop()
    write_json(given.home / "plan.json", plan)
    return given.cut(given.model, given.home / "plan.json")


@case("step 1 (cut_experts)", "unknown key", "did you mean kept?")
def plan_with_a_misspelt_key(given: Given) -> list[object]:
    plan = read_json(given.plan)
    plan["steps"][0]["keep"] = plan["steps"][0].pop("kept")
    write_json(given.home / "plan.json", plan)
    return given.cut(given.model, given.home / "plan.json")


@case("statistics of model", "calibrate it")
def statistics_of_another_model(given: Given) -> list[object]:
    other = write_tiny(given.home / "other", vocab_size=2048, seed=1)
    return ["plan", other, given.out, "--stats", given.stats, "--experts", "4"]


@case("layer-2.safetensors", "calibrate again")
def statistics_without_a_layer(given: Given) -> list[object]:
    stats = shutil.copytree(given.stats, given.home / "stats")
    (stats / "layer-2.safetensors").unlink()
    return ["plan", given.model, given.out, "--stats", stats, "--experts", "4"]


@case("needs calibration statistics", "calibrate first")
def plan_without_statistics(given: Given) -> list[object]:
    return ["plan", given.model, given.out, "--experts", "4"]


@case("methods.protect", "'7' is no layer with experts", "known are 0, 1, 2, 3, mtp.0")
def protect_in_an_unknown_layer(given: Given) -> list[object]:
    return given.keep("--experts", "4", "--set", "methods.protect={'7': [1]}")


@case("methods.protect.1", "5 experts are protected but only 4 are kept", "protect fewer or keep more")
def protect_more_than_is_kept(given: Given) -> list[object]:
    return given.keep("--experts", "4", "--set", "methods.protect={'1': [0, 1, 2, 3, 4]}")


# What is kept


@case("1 experts per layer would stay", "the router selects 2", "keep at least 2 experts or a top_k of at most 1")
def fewer_experts_than_top_k(given: Given) -> list[object]:
    return given.keep("--experts", "1")


@case("keep.experts", "keep 9 of 8", "keep at most 8")
def more_than_there_is(given: Given) -> list[object]:
    return given.keep("--experts", "9")


@case("keep.experts", "percentage above 0", '"0%"')
def nothing_kept(given: Given) -> list[object]:
    return given.keep("--experts", "0%")


@case("keep.experts", 'up to "100%"', '"150%"')
def more_than_all_kept(given: Given) -> list[object]:
    return given.keep("--experts", "150%")


@case("keep.experts", "whole number above 0", '"half"')
def kept_nonsense(given: Given) -> list[object]:
    return given.keep("--experts", "half")


@case("keep.experts", "whole number above 0")
def kept_a_strange_digit(given: Given) -> list[object]:
    return given.keep("--experts", "²")


@case("keep.layers", "whole periods of 2 layers", "or use the method `last`")
def layers_that_break_the_pattern(given: Given) -> list[object]:
    return given.keep("--layers", "3", "--set", "methods.depth=mean_similarity")


# Recipes


@case("--set distill.tokenz", "no known key", "did you mean tokens?")
def unknown_key_on_the_command_line(given: Given) -> list[object]:
    return given.keep("--experts", "4", "--set", "distill.tokenz=3")


@case("recipe.yaml: line 3: keep.expert", "did you mean experts?")
def unknown_key_in_a_recipe(given: Given) -> list[object]:
    return given.run("keep:\n  expert: 4\n")


@case("recipe.yaml", "cannot be read as a YAML recipe", "line 2")
def broken_yaml(given: Given) -> list[object]:
    return given.run("keep: {experts: 4\n")


@case("nothing.yaml", "No such file")
def no_recipe(given: Given) -> list[object]:
    return ["run", given.home / "nothing.yaml", given.out]


@case("shares of tokens add up to 0.7", "must add up to 1")
def shares_that_do_not_add_up(given: Given) -> list[object]:
    return given.run("schedule:\n  - {layers: 1, tokens: 0.5}\n  - {experts: 1, tokens: 0.2}\n")


@case("stage 1 of the schedule", "4 experts per layer", "selects 6")
def experts_cut_before_top_k(given: Given) -> list[object]:
    model = write_tiny(given.home / "wide", vocab_size=2048, num_experts_per_tok=6)
    stages = "schedule:\n  - {experts: 1, tokens: 0.5}\n  - {top_k: 1, tokens: 0.5}\n"
    return [*given.run(f"keep: {{experts: 4, top_k: 2}}\n{stages}"), "--set", f"model={model}"]


@case("evaluate.new_tokens is 3", "at least 6")
def evaluation_that_cannot_work(given: Given) -> list[object]:
    return given.run("evaluate: {new_tokens: 3}\n")


# Text


@case("empty.txt", "holds no text")
def empty_text(given: Given) -> list[object]:
    return ["prune", given.model, given.out, "--experts", "4", "--data", given.written("empty.txt", " \n")]


@case("nothing.txt", "no such file or folder")
def no_text(given: Given) -> list[object]:
    return ["prune", given.model, given.out, "--experts", "4", "--data", given.home / "nothing.txt"]


@case("bad.jsonl:2", "neither `text` nor `messages`", "it has y; name the column", "data.text_key")
def line_without_text(given: Given) -> list[object]:
    file = given.written("bad.jsonl", '{"text": "good"}\n{"y": "lost"}\n')
    return ["calibrate", given.model, given.out, "--data", file]


@case("bad.jsonl:1", "not valid JSON", "column")
def line_that_is_no_json(given: Given) -> list[object]:
    return ["calibrate", given.model, given.out, "--data", given.written("bad.jsonl", "{text: 1}\n")]


@case("the same text is in train", "heldout", "remove it from one of them")
def same_document_in_two_parts(given: Given) -> list[object]:
    heap, other = f"[{{path: {given.text}}}]", given.written("other.jsonl", given.text.read_text().splitlines()[0])
    return given.run(f"data: {{train: {heap}, calibration: {heap}, heldout: [{{path: {other}}}]}}\n")


@case("2 documents are too few", "give more text")
def too_few_documents(given: Given) -> list[object]:
    file = given.written("few.jsonl", '{"text": "one line"}\n{"text": "another line"}\n')
    return ["prune", given.model, given.out, "--experts", "4", "--data", file]


# The machine and its folders


@case("GB free", "needed", "another disk")
def no_room_for_a_run(given: Given) -> list[object]:
    usage = shutil.disk_usage(given.home)._replace(free=1000)
    given.patch.setattr(shutil, "disk_usage", lambda _: usage)
    return given.run("keep: {experts: 4}\n")


@case("GB free", "needed", "another disk")
def no_room_to_prune(given: Given) -> list[object]:
    usage = shutil.disk_usage(given.home)._replace(free=1000)
    given.patch.setattr(shutil, "disk_usage", lambda _: usage)
    return given.keep("--experts", "4")


@case("are free", "choose another output folder")
def no_room_to_cut(given: Given) -> list[object]:
    usage = shutil.disk_usage(given.home)._replace(free=1000)
    given.patch.setattr(shutil, "disk_usage", lambda _: usage)
    return given.cut(given.model)


@case("file: File exists", "run again")
def output_below_a_file(given: Given) -> list[object]:
    return ["cut", given.model, given.plan, given.written("file", "") / "out"]


@case("given twice", "give different models")
def one_model_twice(given: Given) -> list[object]:
    return ["evaluate", given.model, given.model.parent / "." / given.model.name, "--out", given.out]


@case("no run of moeslim", "give the folder of a run")
def report_of_no_run(given: Given) -> list[object]:
    return ["report", given.model.parent / "stats"]


@case("nothing to cut", "--experts 50%")
def prune_without_a_size(given: Given) -> list[object]:
    return ["prune", given.model, given.out]
