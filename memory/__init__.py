"""What a step needs and costs: predicted, compiled, measured."""
