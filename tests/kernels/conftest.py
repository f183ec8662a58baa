"""Triton's interpreter without its largest overhead."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def patch_the_language_once_per_launch():
    """Skip repeated patches of `triton.language`: the interpreter makes all of them again in every call of a helper.

    The first call from each module patches everything, and nothing is restored before the launch ends.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available() or not hasattr(interpreter, "_patch_lang"):  # private: a version may lack it
        yield
        return
    launch, patch_lang, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_afresh(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    def patch_lang_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None  # only a launch restores what was patched, and it comes first
        patched.add(module)
        return patch_lang(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        patch.setattr(interpreter, "_patch_lang", patch_lang_once)
        yield
