"""The methods: the meta-gradient of a task, and the shift of its trajectory after a meta-update."""
