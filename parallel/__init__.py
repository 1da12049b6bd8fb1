"""Floor 0: meshes, sharding rules, precision, rematerialisation, processes; no models, no data."""
