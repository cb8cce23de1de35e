"""The verbs, one file each; a stage never imports another stage or the work directory."""
