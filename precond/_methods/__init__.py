"""Steps that have matrix products between two passes. Private."""
