"""Frozen language models: one file per family, all behind `model.llm.base.LanguageModel`."""
