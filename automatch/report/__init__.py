"""How a mapping is shown to a person; every renderer draws the same `view.View`."""
