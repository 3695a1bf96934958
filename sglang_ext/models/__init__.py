"""SGLang finds the model class here: the package it is told of as SGLANG_EXTERNAL_MODEL_PACKAGE."""
