"""What runs merges: jobs in a database, a queue that carries their ids, worker processes that claim them by lease."""
