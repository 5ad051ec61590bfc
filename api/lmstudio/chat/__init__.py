"""POST /api/v1/chat: LM Studio's own chat."""
