"""What only a GPU can show. Each script runs on a CPU, too: it is known to work beforehand."""
