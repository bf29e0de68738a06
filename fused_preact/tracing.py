"""What the package tells torch.compile, without importing the compiler: that takes a second and a half."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable)


def constant(function: _Function) -> _Function:
    """Mark a function whose result compiled code keeps; it is not traced.

    `torch.compiler.assume_constant_result` sets the same mark, and imports the compiler when it is called.
    """
    function._dynamo_marked_constant = True
    return function
