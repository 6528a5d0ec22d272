# The compiled module, whose signatures are in native/bind*.cc.
from typing import Any

def __getattr__(name: str) -> Any: ...
