"""Make a model forget pictures: each mitigation returns an edit to apply and undo."""
