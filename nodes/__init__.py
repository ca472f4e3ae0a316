"""The nodes, one small file each: a schema and one call inward."""
