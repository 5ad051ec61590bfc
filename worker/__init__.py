"""The GPU worker: owns devices and the runners that hold models in their memory."""
