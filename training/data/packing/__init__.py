"""Which texts stand together in a row.

A corpus is split in one of two ways. Documents that are joined form one stream, each followed by `</s>`, and a row is
a piece of it that fills the row exactly, as in the pre-training of GLM-130B. Documents that stay apart are samples of
their own, which see nothing of each other; only a document longer than a window is split. Either way every token of
the corpus is in exactly one row of an epoch.

No plan is stored. A row of the stream follows from its number. Documents apart are packed in blocks of a fixed number
of tokens, each by itself, and only how many rows come before each block is kept.
"""
