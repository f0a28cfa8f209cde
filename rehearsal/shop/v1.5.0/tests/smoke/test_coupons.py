"""New in v1.5.0: coupons, the list of one's orders, a reference for the payment provider."""


def test_a_coupon_can_be_looked_up(visitor):
    assert visitor.get("/coupons/spring10").json() == {"code": "SPRING10", "percent": 10}
    assert visitor.get("/coupons/nonsense").status_code == 404


def test_a_coupon_makes_an_order_cheaper(customer):
    full = customer.post("/orders", product_id=3, quantity=2).json()
    reduced = customer.post("/orders", product_id=3, quantity=2, coupon="SPRING10").json()

    assert reduced["discount_cents"] == full["amount_cents"] // 10
    assert reduced["amount_cents"] == full["amount_cents"] - reduced["discount_cents"]
    assert len(reduced["payment_reference"]) == 16


def test_an_unknown_coupon_leaves_no_order(customer):
    assert customer.post("/orders", product_id=3, coupon="NONSENSE").status_code == 400


def test_own_orders_are_listed(customer):
    placed = customer.post("/orders", product_id=5).json()

    assert placed["id"] in [order["id"] for order in customer.get("/orders").json()["orders"]]
