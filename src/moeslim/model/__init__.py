"""A live torch model: the trunk of a transformers class with the project's own MTP block and losses."""
