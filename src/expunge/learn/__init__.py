"""Models, deterministic training, shards, many models at once, and the engine that parallel work goes through."""
