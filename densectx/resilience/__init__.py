"""What keeps a run from hanging, from spoiling its weights and from losing them: signals, watchdog, guards, lock."""
