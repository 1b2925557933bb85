"""What enters modules while a model computes."""
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def caught_inputs(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Yields a list for each module; inside, the first argument of each of its calls is appended to it."""
    caught: list[list[Tensor]] = [[] for _ in modules]
    with ExitStack() as stack:
        for module, inputs in zip(modules, caught):
            hook = module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            stack.callback(hook.remove)
        yield caught
