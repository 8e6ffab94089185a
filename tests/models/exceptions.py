from __future__ import annotations
SAME_WIDTH=set()
SETTINGS={}
CHANGED={}
PICTURES={}
ADDED={}
