"""Models that cannot be worked on: files, headers, values, config, tokenizer."""

import shutil

import torch

from bad_input import ROUTER, Given, case, poison
from command import MEASURE, SMALL, TOKENIZER, settings
from moeslim.artifacts.commit import read_json, write_json
from moeslim.checkpoint.index import INDEX_NAME
from tiny import write_tiny


@case("model-00002-of-", "which is not there", "download it again")
def missing_shard(given: Given) -> list[object]:
    folder = given.copy()
    next(folder.glob("model-00002-of-*")).unlink()
    return given.cut(folder)


@case("is cut short", "fetch it again")
def truncated_file(given: Given) -> list[object]:
    folder = given.copy()
    file = next(folder.glob("model-00001-of-*"))
    file.write_bytes(file.read_bytes()[:-100])
    return given.cut(folder)


@case(ROUTER, "I64", "allowed are BF16, F16, F32, F64")
def wrong_dtype(given: Given) -> list[object]:
    return given.cut(given.spoilt(lambda tensors: tensors.update({ROUTER: tensors[ROUTER].long()})))


@case(ROUTER, "(7, 16)", "(8, 16)")
def wrong_shape(given: Given) -> list[object]:
    return given.prune(given.spoilt(lambda tensors: tensors.update({ROUTER: tensors[ROUTER][:7]})), "--experts", "4")


@case("model.layers.0.mlp.extra is not a tensor of this config", "families/qwen3_next.py")
def unknown_tensor(given: Given) -> list[object]:
    return given.cut(given.spoilt(lambda tensors: tensors.update({"model.layers.0.mlp.extra": torch.ones(2)})))


@case("F8_E4M3", "quantised", "BF16 release")
def float8_weights(given: Given) -> list[object]:
    change = {ROUTER: torch.ones(8, 16).to(torch.float8_e4m3fn)}
    return given.cut(given.spoilt(lambda tensors: tensors.update(change)))


@case("quantization_config (gptq)", "BF16 release")
def quantised_config(given: Given) -> list[object]:
    return given.prune(given.configured(quantization_config={"quant_method": "gptq"}), "--experts", "4")


@case("quantization_config (fp8)", "no tensor is packed", "remove it")
def quantised_config_of_plain_weights(given: Given) -> list[object]:
    return given.prune(given.configured(quantization_config={"quant_method": "fp8"}), "--experts", "4")


@case("pytorch_model.bin", "safetensors", "convert it")
def pickles_alone(given: Given) -> list[object]:
    folder = given.copy()
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    return given.cut(folder)


@case("'../elsewhere.safetensors'", "may not leave the folder")
def index_entry_that_leaves_the_folder(given: Given) -> list[object]:
    folder = given.copy()
    index = read_json(folder / INDEX_NAME)
    index["weight_map"][ROUTER] = "../elsewhere.safetensors"
    write_json(folder / INDEX_NAME, index)
    return given.cut(folder)


@case("a link that leaves the folder", "put a copy of the file there")
def link_that_leaves_the_folder(given: Given) -> list[object]:
    folder = given.copy()
    file = next(folder.glob("model-00001-of-*"))
    shutil.move(file, given.home / "elsewhere")
    file.symlink_to(given.home / "elsewhere")
    return given.cut(folder)


@case("model_type", "'grok'", "qwen3_next")
def unknown_family(given: Given) -> list[object]:
    return given.prune(given.configured(model_type="grok"), "--experts", "4")


@case("num_experts_per_tok is 9", "there are 8 experts")
def top_k_above_experts(given: Given) -> list[object]:
    return given.prune(given.configured(num_experts_per_tok=9), "--experts", "50%")


@case("nowhere/model", "the hub did not give it", "give its folder")
def unknown_hub_name(given: Given) -> list[object]:
    return given.prune("nowhere/model", "--experts", "50%")


@case("no-such-folder", "no such folder", "owner/model")
def no_model(given: Given) -> list[object]:
    return given.prune("no-such-folder", "--experts", "50%")


@case(ROUTER, "NaN or Inf")
def nan_weights_verify(given: Given) -> list[object]:
    return ["verify", given.spoilt(poison(ROUTER))]


@case("the cut model is not sound", "lm_head.weight has 1 values that are NaN")
def nan_weights_cut(given: Given) -> list[object]:
    return given.cut(given.spoilt(poison("lm_head.weight")))


@case("layer 1", "is NaN or Inf", "moeslim verify")
def nan_weights_prune(given: Given) -> list[object]:
    return given.prune(given.spoilt(poison(ROUTER)), "--experts", "4")


@case("step 1", "nan", "moeslim verify")
def nan_in_training(given: Given) -> list[object]:
    return given.train(given.spoilt(poison("lm_head.weight", float("inf"))))


@case("its loss on", "NaN or Inf", "moeslim verify")
def nan_in_evaluation(given: Given) -> list[object]:
    folder = given.spoilt(poison("lm_head.weight", float("inf")))
    return ["evaluate", folder, "--out", given.out / "records", "--data", given.text, *settings(*SMALL, *MEASURE)]


@case("tokenizer_config.json was changed", "receipt")
def changed_side_file(given: Given) -> list[object]:
    folder = given.copy()
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text.replace(" ", "\n", 1))
    return ["verify", folder]


@case("there is no tokenizer", "put the model's tokenizer.json")
def no_tokenizer(given: Given) -> list[object]:
    folder = given.copy()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "receipt.json").unlink()
    return given.prune(folder, "--experts", "4")


@case("2048 tokens and the embedding 64 rows", "resize the model's embedding")
def tokenizer_of_another_vocabulary(given: Given) -> list[object]:
    return given.prune(write_tiny(given.home / "model", form={"tokenizer_from": TOKENIZER}), "--experts", "4")


@case("vocab_size is 64", "is 2048", "choose a teacher with the student's tokenizer")
def teacher_of_another_vocabulary(given: Given) -> list[object]:
    return given.train(given.model, "--teacher", write_tiny(given.home / "teacher"))
