-- migrate:up
CREATE TABLE jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL,
    order_id bigint NOT NULL REFERENCES orders,
    created_at timestamptz NOT NULL DEFAULT now(),
    done_at timestamptz
);
CREATE INDEX jobs_waiting ON jobs (id) WHERE done_at IS NULL;

-- migrate:down
DROP TABLE jobs;
