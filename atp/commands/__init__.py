"""The commands a user types: arguments in, exit code out.

Takes the command line; calls :mod:`atp.run` or one other room, prints what it gives, and turns a user's mistake into
one line and exit code 2. It knows options and messages, and does none of the work.
"""
