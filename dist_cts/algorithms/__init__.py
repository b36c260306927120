"""The methods: what a task's meta-gradient is and how a meta-update shifts its trajectory."""
