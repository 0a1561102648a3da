"""One page from the folders of finished runs. Nothing here runs an experiment or imports one."""
