"""The command line; but when torchrun starts it for the first time, its second process dies in the fifth step."""

import os
import signal

import maskwright.cli
import maskwright.training.train as train_module

real = train_module.train_step


def die_in_the_fifth_step(*arguments):
    if arguments[-1] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)


if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        train_module.train_step = die_in_the_fifth_step
    maskwright.cli.main()
