"""What `ray up` and the head ask of a cloud with the files in cluster/: AWS is moto's, in this process."""

import copy
import json
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.client import BaseClient
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

CLUSTER = Path(__file__).parents[2] / "cluster"
AWS = CLUSTER / "aws.yaml"


def policy(name: str) -> list[dict]:
    return json.loads((CLUSTER / "iam" / f"{name}.json").read_text())["Statement"]


def actions(statement: dict) -> set[str]:
    listed = statement["Action"]
    return {listed} if isinstance(listed, str) else set(listed)


def of_ec2(name: str) -> set[str]:
    return {action for statement in policy(name) for action in actions(statement) if action.startswith("ec2:")}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The calls to AWS, as (action, parameters), of an account with a network and a role but no machines."""
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    made: list[tuple[str, dict]] = []
    call = BaseClient._make_api_call

    def record(client, operation, parameters):
        made.append((f"{client.meta.service_model.service_name}:{operation}", parameters))
        return call(client, operation, parameters)

    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="mrd-ray-head")
        monkeypatch.setattr(BaseClient, "_make_api_call", record)
        yield made


@pytest.fixture
def config(calls):
    """aws.yaml with what its first lines leave to its user."""
    ec2 = boto3.client("ec2", region_name="us-west-2")
    network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    names = {"MACHINE_IMAGE": ec2.describe_images()["Images"][0]["ImageId"]}
    names["SECURITY_GROUP"] = ec2.create_security_group(GroupName="own", Description="own", VpcId=network)["GroupId"]
    for number, zone in enumerate("ABC"):
        block, where = f"10.0.{number}.0/24", f"us-west-2{zone.lower()}"
        subnet = ec2.create_subnet(VpcId=network, CidrBlock=block, AvailabilityZone=where)
        names[f"SUBNET_{zone}"] = subnet["Subnet"]["SubnetId"]
    text = AWS.read_text()
    for name, value in names.items():
        text = text.replace(name, value)
    calls.clear()
    return prepare_config(yaml.safe_load(text))


def start(config, kind: str) -> AWSNodeProvider:
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node = copy.deepcopy(config["available_node_types"][kind]["node_config"])
    provider.create_node(node, {TAG_RAY_NODE_KIND: kind}, 1)
    return provider


def ends(provider: AWSNodeProvider) -> None:
    nodes = provider.non_terminated_nodes({})
    assert all(provider.external_ip(node) is None for node in nodes)
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    assert provider.is_running(nodes[0])
    provider.terminate_nodes(nodes)


def asked(calls) -> set[str]:
    return {action for action, _ in calls}


def test_operator_and_head_may_do_what_ray_does_and_no_more(config, calls):
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
    ends(start(config, "head"))
    assert asked(calls) == of_ec2("operator")
    calls.clear()
    AWSNodeProvider.fillout_available_node_types_resources(config)
    ends(start(config, "worker"))
    assert asked(calls) == of_ec2("head")


def test_ray_makes_no_role_and_no_group(config, calls):
    bootstrap_aws(config)
    assert asked(calls) == {
        *("ec2:CreateKeyPair", "ec2:DescribeKeyPairs", "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets")
    }


def test_machines_are_in_our_group_without_a_public_address(config, calls):
    config = bootstrap_aws(config)
    group = config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    for kind in ("head", "worker"):
        start(config, kind)
    wanted = [parameters for action, parameters in calls if action == "ec2:RunInstances"]
    assert len(wanted) == 2
    for parameters in wanted:
        (tags,) = parameters["TagSpecifications"]
        assert {"Key": TAG_RAY_CLUSTER_NAME, "Value": "mrd-ray"} in tags["Tags"]  # the policies' condition
        assert parameters["SecurityGroupIds"] == group
        assert parameters["MetadataOptions"] == {"HttpTokens": "required"}
    assert [one.get("IamInstanceProfile") for one in wanted] == [{"Name": "mrd-ray-head"}, None]


@pytest.mark.parametrize("name", ["operator", "head"])
def test_policies_reach_this_cluster_only(name):
    assert yaml.safe_load(AWS.read_text())["cluster_name"] == "mrd-ray"
    for statement in policy(name):
        assert statement["Effect"] == "Allow"
        named = {key: value for one in statement.get("Condition", {}).values() for key, value in one.items()}
        assert all(value == "mrd-ray" for key, value in named.items() if "Tag/" in key)
        assert statement["Resource"] != "*" or all(one.startswith("ec2:Describe") for one in actions(statement))
        assert named or not {"ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"} & actions(statement)
