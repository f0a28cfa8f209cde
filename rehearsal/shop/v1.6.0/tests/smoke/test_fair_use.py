"""New in v1.6.0: clients are paced, and a patient one never notices."""


def test_a_patient_client_is_always_served(visitor):
    assert [visitor.get("/products").status_code for _ in range(4)] == [200] * 4
