"""What only a GPU can show. Each script can be tried on a CPU beforehand."""
