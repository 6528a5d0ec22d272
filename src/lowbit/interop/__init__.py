"""Other tools' files: a model leaves for llama.cpp, transformers or vLLM, codes and scales as they are.

`export.export` writes every target; `lowbit export` is its command.
"""
