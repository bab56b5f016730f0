"""Presses Ctrl-C in a command at a chosen forward pass. Run by ``tests.helpers.warm``."""

import os
import signal
import sys

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hfprune.cli import main as hfprune


def main(args, passes, training=False):
    """Runs a command; before its forward pass number ``passes``, of training ones or of all, the process gets SIGINT.

    A background job of a shell ignores SIGINT, and so do its children: the handler of Python is set again.
    """
    sys.warnoptions.clear()  # of the server, which ignores warnings: the command says what it says in a terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    left = [passes]

    def count(module, inputs):
        if isinstance(module, nn.Embedding) and (module.training or not training):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)

    register_module_forward_pre_hook(count)
    status = hfprune(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
