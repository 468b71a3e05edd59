"""Both stages from Python, a call each: what the commands do, without a shell.

As the command line, these functions take what a person writes, call what does the work, and hand
out the result; `msq extract` and `msq.extract_features` share one definition of every option and
default. They print nothing unless they are asked to, raise `msq.errors.MsqError`, and say by a
Python warning (`msq.errors.MsqWarning`) what a command would say on stderr of videos, lines and
trials that could not be used.
"""
