"""Floor 0: meshes, sharding rules, precision, rematerialisation, processes. Knows nothing of models or data."""
