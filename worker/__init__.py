"""The worker: owns devices, and the runners that hold models in the devices' memory."""
