"""How fast is it, and is it still right: comparisons with a gate before every number.

`cases` says what there is, `runner` runs it, and `head_cases`, `store_cases` and `decode_cases`
hold the comparisons. Nothing but the command line and `msq.report` imports this room. Of its
modules only `store_cases` and `decode_cases` need more than `msq.head` does.
"""
