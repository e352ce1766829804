"""One file per op, named as the op: its cases, its peers and what it cannot avoid doing."""
