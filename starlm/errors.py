"""Every error that StarLM raises on purpose.

StarLMError            exit code 1: the work failed (non-finite loss, out of memory)
└── InputError         exit code 2: what the user gave cannot be used (file, config, checkpoint, prompt)

A message is one paragraph: what was wrong, where, and what to do about it.
"""


class StarLMError(Exception):
    """A failure that the command line prints as one paragraph, without a traceback."""

    exit_code = 1


class InputError(StarLMError, ValueError):
    """Something that the user gave is missing, damaged, or impossible."""

    exit_code = 2
