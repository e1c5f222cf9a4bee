"""The losses of other libraries under their own names, on the kernels of fastnce.

``fastnce.integrations.open_clip.ClipLoss`` has the signature, the defaults and the behaviour of open_clip's, and does not need
open_clip. ``docs/migrate.md`` has a table for each library, with what differs.
"""
