"""A network's description and its weights.

config, families, rope, fields    what config.json says, as data
tensors                           the tensors that a described network has, by canonical name
checkpoint and the *_checkpoint   readers: transformers, GGUF and lowbit containers
tokenizer, chat, detokenizer      text to ids and back
loader                            a checkpoint becomes a native decoder
reference                         the described decoder in NumPy

Import from the files: each brings in only what it needs, and starting is part of the speed.
"""
