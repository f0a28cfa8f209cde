-- migrate:up
CREATE TABLE fair_use_limits (
    kind text PRIMARY KEY,
    gap_ms integer NOT NULL CHECK (gap_ms >= 0),
    most_waiting integer NOT NULL CHECK (most_waiting > 0)
);
INSERT INTO fair_use_limits (kind, gap_ms, most_waiting) VALUES ('browser', 295, 3);

-- migrate:down
DROP TABLE fair_use_limits;
