"""Pure tensor math of the three stages: equation, meaning and paper at every function. Imports nothing of ours."""
