"""What a process gives up: files, other processes and the network, by Landlock and seccomp."""
