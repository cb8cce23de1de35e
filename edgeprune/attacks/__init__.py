"""How to perturb an input so that the model errs; one file per attack."""
