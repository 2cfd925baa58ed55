"""What a run should be given, worked out from what a short one measured."""
