"""What must work after every release: look, log in, order, dashboard, background job."""


def test_products_can_be_seen(visitor):
    assert visitor.get("/").status_code == 200
    assert len(visitor.get("/products").json()["products"]) > 0


def test_wrong_password_is_refused(visitor):
    assert visitor.post("/login", user="smoke", password="wrong").status_code == 401


def test_an_order_is_placed_and_processed(customer, until):
    placed = customer.post("/orders", product_id=3, quantity=2)
    assert placed.status_code == 201, placed.text
    path = f"/orders/{placed.json()['id']}"

    assert until(lambda: customer.get(path).json()["status"] == "processed")


def test_the_dashboard_shows_figures(customer):
    figures = customer.get("/dashboard").json()

    assert figures["user"] == "smoke"
    assert figures["orders"] > 0
    assert figures["revenue_cents"] > 0
    assert figures["queue_depth_jobs"] >= 0
