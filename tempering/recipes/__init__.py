"""Recipes shipped with the package: `tempering run digits`, `tempering run cifar100`, ..."""
