"""Standard evaluation: the tasks of lm-eval on a model under any layout."""
