PRAGMA user_version = 2;
BEGIN TRANSACTION;
CREATE TABLE artifacts (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL UNIQUE,
            size_bytes BIGINT NOT NULL, metadata TEXT NOT NULL, record TEXT NOT NULL, blueprint_id TEXT NOT NULL DEFAULT '', blueprint_digest TEXT NOT NULL DEFAULT '', mode TEXT NOT NULL DEFAULT '', position TEXT NOT NULL DEFAULT '', adds_capacity INTEGER NOT NULL DEFAULT 0, draws_random INTEGER NOT NULL DEFAULT 0, parameter_count BIGINT NOT NULL DEFAULT 0, dtype TEXT NOT NULL DEFAULT '', in_features BIGINT, out_features BIGINT, num_axes INTEGER NOT NULL DEFAULT 0, published_at_s DOUBLE PRECISION);
INSERT INTO "artifacts" VALUES(1,'4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',518,'{"adds_capacity": true, "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000001", "blueprint_id": "kernel-1", "draws_random": false, "input_spec": {"dtype": "float32", "shape": [4]}, "lineage": [], "mode": "add", "output_spec": {"dtype": "float32", "shape": [4]}, "parameter_count": 4, "position": "parallel", "zeroed": null}','{"toolchain": "torch 2.13.0"}','kernel-1','0000000000000000000000000000000000000000000000000000000000000001','add','parallel',1,0,4,'float32',4,4,0,1000.0);
INSERT INTO "artifacts" VALUES(2,'8975306aeddec52608f9888c152aca27731169d4b4ee0fea24cac547a162f8c5',611,'{"adds_capacity": true, "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000002", "blueprint_id": "kernel-2", "draws_random": false, "input_spec": {"dtype": "float32", "shape": [8, "H", "W"]}, "lineage": [], "mode": "add", "output_spec": {"dtype": "float32", "shape": [16, "OH", "OW"]}, "parameter_count": 20, "position": "parallel", "zeroed": null}','{}','kernel-2','0000000000000000000000000000000000000000000000000000000000000002','add','parallel',1,0,20,'float32',8,16,2,1000.0);
CREATE TABLE audit (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, at_s DOUBLE PRECISION NOT NULL, actor TEXT NOT NULL,
            action TEXT NOT NULL, subject TEXT NOT NULL, detail TEXT NOT NULL);
INSERT INTO "audit" VALUES(1,1000.0,'ann','tag','mlp:latest','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462');
INSERT INTO "audit" VALUES(2,1000.0,'ann','deprecate','8975306aeddec52608f9888c152aca27731169d4b4ee0fea24cac547a162f8c5','');
CREATE TABLE condemned (digest TEXT PRIMARY KEY, since_s DOUBLE PRECISION NOT NULL);
CREATE TABLE deprecations (
            digest TEXT PRIMARY KEY, reason TEXT NOT NULL, successor TEXT, actor TEXT,
            deprecated_at_s DOUBLE PRECISION NOT NULL);
INSERT INTO "deprecations" VALUES('8975306aeddec52608f9888c152aca27731169d4b4ee0fea24cac547a162f8c5','slow','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462','ann',1000.0);
CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            blueprint_digest TEXT NOT NULL, toolchain TEXT NOT NULL, options TEXT NOT NULL,
            blueprint TEXT NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL,
            num_losses INTEGER NOT NULL, worker TEXT, leased_until_s DOUBLE PRECISION,
            artifact_id TEXT, report TEXT, submitted_by TEXT,
            submitted_at_s DOUBLE PRECISION NOT NULL,
            UNIQUE (blueprint_digest, toolchain, options));
CREATE TABLE outcomes (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, run_id TEXT NOT NULL, graft_id TEXT NOT NULL,
            report TEXT NOT NULL, UNIQUE (run_id, graft_id));
INSERT INTO "outcomes" VALUES(1,'4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462','run-0','1','{"artifact_id": "4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462", "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000001", "contribution": 0.02, "graft_id": "1", "in_features": 4, "metric": "gate loss", "num_looks": 200, "out_features": 4, "run_id": "run-0", "site_kind": "linear", "standard_error": 0.01, "unit": "relative", "verdict": "fossilized"}');
INSERT INTO "outcomes" VALUES(2,'4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462','run-1','1','{"artifact_id": "4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462", "blueprint_digest": "0000000000000000000000000000000000000000000000000000000000000001", "contribution": 0.04, "graft_id": "1", "in_features": 4, "metric": "gate loss", "num_looks": 200, "out_features": 4, "run_id": "run-1", "site_kind": "linear", "standard_error": 0.01, "unit": "relative", "verdict": "fossilized"}');
CREATE TABLE tag_moves (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, tag TEXT NOT NULL,
            digest TEXT, moved_at_s DOUBLE PRECISION NOT NULL, actor TEXT);
INSERT INTO "tag_moves" VALUES(1,'mlp','latest','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462',1000.0,'ann');
CREATE TABLE tags (
            name TEXT NOT NULL, tag TEXT NOT NULL,
            digest TEXT NOT NULL REFERENCES artifacts (digest), PRIMARY KEY (name, tag));
INSERT INTO "tags" VALUES('mlp','latest','4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462');
CREATE TABLE tokens (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
            scopes TEXT NOT NULL, created_at_s DOUBLE PRECISION NOT NULL,
            revoked_at_s DOUBLE PRECISION);
CREATE TABLE validations (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, report TEXT NOT NULL);
INSERT INTO "validations" VALUES(1,'4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462','{"artifact_id": "4bc69d5fd20a2686d468002e17b116af255bce273fd20243793150db18e71462", "findings": {}, "passed": true, "reason": "", "toolchain": "torch 2.13.0"}');
CREATE INDEX tags_by_digest ON tags (digest);
CREATE INDEX tag_moves_by_name ON tag_moves (name, tag);
CREATE INDEX artifacts_by_blueprint ON artifacts (blueprint_digest);
CREATE INDEX artifacts_by_fit ON artifacts (out_features, in_features, num_axes, dtype);
CREATE INDEX outcomes_by_digest ON outcomes (digest);
CREATE INDEX validations_by_digest ON validations (digest);
CREATE INDEX jobs_to_do ON jobs (status, leased_until_s, seq);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('artifacts',2);
INSERT INTO "sqlite_sequence" VALUES('tag_moves',1);
INSERT INTO "sqlite_sequence" VALUES('audit',2);
INSERT INTO "sqlite_sequence" VALUES('outcomes',2);
INSERT INTO "sqlite_sequence" VALUES('validations',1);
COMMIT;
