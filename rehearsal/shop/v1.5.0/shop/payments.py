"""What the payment provider is told about an order."""

import hashlib
import hmac

from shop.settings import Settings


def payment_reference(settings: Settings, order_id: int) -> str:
    """Name an order to the provider: only who knows the webhook's address can make such a reference."""
    message = f"order {order_id}".encode()
    return hmac.new(settings.payment_webhook_url.encode(), message, hashlib.sha256).hexdigest()[:16]
