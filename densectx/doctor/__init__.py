"""``densectx doctor``: whether this machine, and the cluster around it, can train; what to do where it cannot."""
