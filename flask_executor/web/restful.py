"""The controller as resources of `Flask-RESTful <https://flask-restful.readthedocs.io>`_; extra ``restful``.

.. code-block:: python

    class Reports(JobsResource):
        controller = controller      # a Controller that is mounted in the same app

        def post(self, name):        # what is not overridden stays as it is
            check_quota(current_user)
            return super().post(name)

    class Report(JobResource):
        controller = controller

    api = Api(app)
    api.add_resource(Reports, "/reports", "/reports/<name>")
    api.add_resource(Report, "/reports/jobs/<id>")

The links in their answers are the urls of the controller.
"""

from __future__ import annotations

from typing import ClassVar

from werkzeug.wrappers import Response

from flask_executor.exceptions import MissingExtra
from flask_executor.web.controller import Controller
from flask_executor.web.problems import store_or_problem

try:
    from flask_restful import Resource
except ImportError as error:
    raise MissingExtra("flask_restful", "restful") from error


class JobsResource(Resource):  # type: ignore[misc]  # Flask-RESTful has no types
    """All jobs: GET lists them, POST with a name starts one."""

    #: The controller that has the jobs; to be set in the subclass.
    controller: ClassVar[Controller]

    def get(self, name: str | None = None) -> Response:
        """List jobs."""
        with store_or_problem():
            return self.controller.index()

    def post(self, name: str) -> Response:
        """Start the function that is exposed under this name."""
        with store_or_problem():
            return self.controller.run(name)


class JobResource(Resource):  # type: ignore[misc]
    """One job: GET answers with its status, DELETE stops it."""

    #: The controller that has the job; to be set in the subclass.
    controller: ClassVar[Controller]

    def get(self, id: str) -> Response:
        """Answer with its status."""
        with store_or_problem():
            return self.controller.job(id)

    def delete(self, id: str) -> Response:
        """Ask it to stop."""
        with store_or_problem():
            return self.controller.stop(id)
